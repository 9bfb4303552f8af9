// Buffers come as addresses: fastclip.data has checked what lies there and keeps it alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <stdexcept>

#include "data_bindings.h"
#include "resample.h"

namespace py = pybind11;

namespace fastclip {
namespace {

constexpr int kLongestSide = 1 << 16;

void resize(Resampler& resampler, std::uintptr_t source, std::size_t capacity, int width,
            int height, const std::array<float, 4>& box, int size, std::uintptr_t out) {
  const auto [left, upper, right, lower] = box;
  if (width < 1 || height < 1 || width > kLongestSide || height > kLongestSide)
    throw std::invalid_argument("an image's sides are between 1 and 65536 pixels");
  if (size < 1 || size > kLongestSide)
    throw std::invalid_argument("size is between 1 and 65536 pixels");
  const bool inside = left >= 0 && upper >= 0 && right <= width && lower <= height;
  if (!inside || !(left < right) || !(upper < lower))
    throw std::invalid_argument("the box is empty or reaches over the image's edge");
  const std::size_t stride = static_cast<std::size_t>(width) * 3;
  if (capacity < stride * height + Resampler::kSlack)
    throw std::invalid_argument("the image's buffer is too small");
  py::gil_scoped_release release;
  resampler.resize(reinterpret_cast<const std::uint8_t*>(source), width, height,
                   {left, upper, right, lower}, size, reinterpret_cast<std::uint8_t*>(out));
}

}  // namespace

void bind_resample(py::module_& module) {
  module.attr("SLACK") = Resampler::kSlack;
  py::class_<Resampler>(module, "Resampler")
      .def(py::init<const char*>(), py::arg("instructions") = "")
      .def("resize", &resize, py::arg("source"), py::arg("capacity"), py::arg("width"),
           py::arg("height"), py::arg("box"), py::arg("size"), py::arg("out"))
      .def_property_readonly("instructions", &Resampler::instructions);
}

}  // namespace fastclip
