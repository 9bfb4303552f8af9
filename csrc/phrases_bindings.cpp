#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "data_bindings.h"
#include "phrases.h"
#include "utf8.h"

namespace py = pybind11;

namespace fastclip {
namespace {

// A sequence of str as UTF-8: ASCII in place, others as copies. Lone surrogates stay what they are.
class Utf8Texts {
 public:
  // Keeps the str objects: the sequence may change meanwhile.
  explicit Utf8Texts(const py::object& sequence)
      : owner_(py::reinterpret_steal<py::object>(PySequence_Tuple(sequence.ptr()))) {
    if (!owner_) throw py::error_already_set();
    const auto count = static_cast<std::size_t>(PyTuple_GET_SIZE(owner_.ptr()));
    texts_.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
      PyObject* text = PyTuple_GET_ITEM(owner_.ptr(), static_cast<Py_ssize_t>(i));
      if (!PyUnicode_Check(text))
        throw py::type_error("texts[" + std::to_string(i) + "] is " + Py_TYPE(text)->tp_name +
                             ", not str");
#if PY_VERSION_HEX < 0x030C0000
      if (PyUnicode_READY(text) != 0) throw py::error_already_set();
#endif
      const auto length = static_cast<std::size_t>(PyUnicode_GET_LENGTH(text));
      if (PyUnicode_IS_ASCII(text)) {
        texts_.emplace_back(static_cast<const char*>(PyUnicode_DATA(text)), length);
      } else {
        others_.push_back(
            {i, PyUnicode_DATA(text), length, static_cast<int>(PyUnicode_KIND(text))});
        texts_.emplace_back();
      }
    }
  }

  // To be called once, and needs no GIL: a str does not change.
  const std::vector<std::string_view>& views() {
    std::size_t units = 0;
    for (const Other& other : others_) units += other.length;
    copies_.resize(units * 4);
    auto* const begin = reinterpret_cast<std::uint8_t*>(copies_.data());
    std::uint8_t* to = begin;
    for (const Other& other : others_) {
      std::uint8_t* const from = to;
      switch (other.kind) {
        case PyUnicode_1BYTE_KIND:
          to = put(static_cast<const std::uint8_t*>(other.data), other.length, to);
          break;
        case PyUnicode_2BYTE_KIND:
          to = put(static_cast<const std::uint16_t*>(other.data), other.length, to);
          break;
        default:
          to = put(static_cast<const std::uint32_t*>(other.data), other.length, to);
      }
      texts_[other.index] = {copies_.data() + (from - begin), static_cast<std::size_t>(to - from)};
    }
    return texts_;
  }

 private:
  struct Other {
    std::size_t index;
    const void* data;
    std::size_t length;
    int kind;
  };

  template <typename Unit>
  static std::uint8_t* put(const Unit* units, std::size_t length, std::uint8_t* to) {
    for (std::size_t i = 0; i < length; ++i) to = put_utf8(to, units[i]);
    return to;
  }

  py::object owner_;
  std::vector<std::string_view> texts_;
  std::vector<Other> others_;
  std::vector<char> copies_;
};

template <typename T>
py::array_t<T> as_array(std::vector<T>&& values) {
  auto* const owned = new std::vector<T>(std::move(values));
  const py::capsule owner(owned, [](void* memory) { delete static_cast<std::vector<T>*>(memory); });
  return py::array_t<T>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

PhraseTable make_table(const py::object& phrases) {
  Utf8Texts texts(phrases);
  const py::gil_scoped_release released;
  return PhraseTable(texts.views());
}

py::tuple match(const PhraseTable& table, const py::object& sequence) {
  Utf8Texts texts(sequence);
  PhraseMatches matches;
  {
    const py::gil_scoped_release released;
    matches = table.match(texts.views());
  }
  return py::make_tuple(as_array(std::move(matches.offsets)), as_array(std::move(matches.ids)));
}

}  // namespace

void bind_phrases(py::module_& module) {
  py::class_<PhraseTable>(module, "PhraseTable")
      .def(py::init(&make_table), py::arg("phrases"))
      .def("match", &match, py::arg("texts"))
      .def("__len__", &PhraseTable::size);
}

}  // namespace fastclip
