// The module fastclip.tokenizer._cuda. Memory and streams come as addresses:
// fastclip.tokenizer.cuda has checked what lies there and keeps it alive.
#include <pybind11/pybind11.h>

#include <memory>
#include <string_view>

#include "bpe_cuda.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, module) {
  using namespace fastclip;
  module.doc() = "CLIP's tokenizer on a GPU; use fastclip.tokenizer.cuda.CudaTokenizer.";
  module.def("device_count", &cuda_device_count);
  py::class_<CudaEncoder>(module, "Encoder")
      .def(py::init([](const py::bytes& merges, int unicode_version, bool strict, int device) {
             return std::make_unique<CudaEncoder>(std::string_view(merges), unicode_version, strict,
                                                  device);
           }),
           py::arg("merges"), py::arg("unicode_version"), py::arg("strict"), py::arg("device"))
      .def(
          "encode",
          [](const CudaEncoder& encoder, std::uintptr_t data, std::size_t size,
             std::uintptr_t offsets, std::size_t count, std::uintptr_t rows,
             std::size_t context_length, int id_bytes, std::uintptr_t lengths,
             std::uintptr_t refused, bool truncate, std::uintptr_t stream) {
            const CudaBatch batch{reinterpret_cast<const std::uint8_t*>(data),
                                  size,
                                  reinterpret_cast<const std::int32_t*>(offsets),
                                  count,
                                  reinterpret_cast<void*>(rows),
                                  context_length,
                                  id_bytes,
                                  reinterpret_cast<std::int32_t*>(lengths),
                                  reinterpret_cast<std::int32_t*>(refused),
                                  truncate};
            const py::gil_scoped_release released;
            encoder.encode(batch, reinterpret_cast<void*>(stream));
          },
          py::arg("data"), py::arg("size"), py::arg("offsets"), py::arg("count"), py::arg("rows"),
          py::arg("context_length"), py::arg("id_bytes"), py::arg("lengths"), py::arg("refused"),
          py::arg("truncate"), py::arg("stream"));
}
