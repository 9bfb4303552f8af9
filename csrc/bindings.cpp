// The module fastclip.tokenizer._native: the only file that sees Python.
//
// Buffers come as addresses: fastclip.tokenizer has checked what lies there and keeps it alive.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "batch.h"
#include "utf8.h"

namespace py = pybind11;

namespace fastclip {
namespace {

constexpr std::size_t kLongestText = std::numeric_limits<std::uint32_t>::max() / 8;

// `PyUnicode_AsUTF8` would make, and keep, a second copy of a text, and refuse lone surrogates.
TextView view_of_str(PyObject* text) {
#if PY_VERSION_HEX < 0x030C0000
  if (PyUnicode_READY(text) != 0) throw py::error_already_set();
#endif
  TextView view{PyUnicode_DATA(text), static_cast<std::size_t>(PyUnicode_GET_LENGTH(text)),
                Storage::kAscii};
  if (PyUnicode_IS_COMPACT_ASCII(text)) return view;
  switch (PyUnicode_KIND(text)) {
    case PyUnicode_1BYTE_KIND:
      view.storage = PyUnicode_IS_ASCII(text) ? Storage::kAscii : Storage::kLatin1;
      break;
    case PyUnicode_2BYTE_KIND:
      view.storage = Storage::kUcs2;
      break;
    default:
      view.storage = Storage::kUcs4;
  }
  return view;
}

// Texts of one batch, and what keeps them alive.
class Texts {
 public:
  // A list or tuple of str and bytes. The references are its own: the list may change meanwhile.
  static std::unique_ptr<Texts> from_sequence(const py::object& sequence) {
    auto texts = std::make_unique<Texts>();
    texts->owner_ = py::reinterpret_steal<py::object>(PySequence_Tuple(sequence.ptr()));
    if (!texts->owner_) throw py::error_already_set();
    const auto count = static_cast<std::size_t>(PyTuple_GET_SIZE(texts->owner_.ptr()));
    texts->views_.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
      PyObject* text = PyTuple_GET_ITEM(texts->owner_.ptr(), static_cast<Py_ssize_t>(i));
      if (PyUnicode_Check(text)) {
        texts->add(view_of_str(text));
      } else if (PyBytes_Check(text)) {
        texts->add({PyBytes_AS_STRING(text), static_cast<std::size_t>(PyBytes_GET_SIZE(text)),
                    Storage::kUtf8});
      } else {
        throw py::type_error("texts[" + std::to_string(i) + "] is " + Py_TYPE(text)->tp_name +
                             ", not str or bytes");
      }
    }
    return texts;
  }

  // UTF-8 in one piece, text i from offsets[i] to offsets[i + 1], as Arrow has it.
  template <typename Offset>
  static std::unique_ptr<Texts> from_offsets(std::uintptr_t data, std::uintptr_t offsets,
                                             std::size_t count) {
    auto texts = std::make_unique<Texts>();
    texts->views_.reserve(count);
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(data);
    const auto* starts = reinterpret_cast<const Offset*>(offsets);
    for (std::size_t i = 0; i < count; ++i) {
      if (starts[i] < 0 || starts[i + 1] < starts[i]) {
        throw py::value_error("the offsets of texts[" + std::to_string(i) + "] decrease");
      }
      texts->add(
          {bytes + starts[i], static_cast<std::size_t>(starts[i + 1] - starts[i]), Storage::kUtf8});
    }
    return texts;
  }

  // UTF-8 in cells of `width` bytes, each filled up with zeros, as NumPy's "S" has it.
  static std::unique_ptr<Texts> from_cells(std::uintptr_t data, std::size_t width,
                                           std::size_t count) {
    auto texts = std::make_unique<Texts>();
    texts->views_.reserve(count);
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(data);
    for (std::size_t i = 0; i < count; ++i) {
      std::size_t length = width;
      while (length > 0 && bytes[i * width + length - 1] == 0) --length;
      texts->add({bytes + i * width, length, Storage::kUtf8});
    }
    return texts;
  }

  // Some of them, in the order asked for.
  std::unique_ptr<Texts> select(const std::vector<std::size_t>& indices) const {
    auto chosen = std::make_unique<Texts>();
    if (owner_) {
      py::tuple owner(indices.size());
      for (std::size_t i = 0; i < indices.size(); ++i) owner[i] = owner_[py::int_(indices[i])];
      chosen->owner_ = std::move(owner);
    }
    for (const std::size_t index : indices) chosen->views_.push_back(views_.at(index));
    return chosen;
  }

  // What `write_utf8` writes, in bytes.
  std::size_t utf8_size() const {
    std::size_t size = 0;
    for (const TextView& view : views_) {
      if (is_bytes(view)) {
        size += view.length;
      } else {
        each_code_point(
            view, [&size](std::uint32_t c) { size += static_cast<std::size_t>(utf8_length(c)); });
      }
    }
    return size;
  }
  // All texts in one piece, and where each begins: offsets[size() + 1]. Lone surrogates, and bytes
  // that are no UTF-8, stay what they are.
  void write_utf8(std::uintptr_t data, std::uintptr_t offsets) const {
    const py::gil_scoped_release released;
    auto* const begin = reinterpret_cast<std::uint8_t*>(data);
    auto* const starts = reinterpret_cast<std::int32_t*>(offsets);
    std::uint8_t* to = begin;
    for (std::size_t i = 0; i < views_.size(); ++i) {
      starts[i] = static_cast<std::int32_t>(to - begin);
      const TextView& view = views_[i];
      if (is_bytes(view)) {
        if (view.length != 0) std::memcpy(to, view.data, view.length);
        to += view.length;
      } else {
        each_code_point(view, [&to](std::uint32_t c) { to = put_utf8(to, c); });
      }
    }
    starts[views_.size()] = static_cast<std::int32_t>(to - begin);
  }

  std::size_t size() const { return views_.size(); }
  const TextView* views() const { return views_.data(); }

  // One text as Python has it.
  py::object as_str(std::size_t index) const {
    const TextView& view = views_[index];
    if (view.storage != Storage::kUtf8) {
      return py::reinterpret_borrow<py::object>(
          PyTuple_GET_ITEM(owner_.ptr(), static_cast<Py_ssize_t>(index)));
    }
    auto text = py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(
        static_cast<const char*>(view.data), static_cast<Py_ssize_t>(view.length), "replace"));
    if (!text) throw py::error_already_set();
    return text;
  }

 private:
  void add(const TextView& view) {
    if (view.length > kLongestText) {
      throw py::value_error("texts[" + std::to_string(views_.size()) +
                            "] is longer than half a billion characters");
    }
    views_.push_back(view);
  }

  static bool is_bytes(const TextView& view) {
    return view.storage == Storage::kAscii || view.storage == Storage::kUtf8;
  }
  template <typename Use>
  static void each_code_point(const TextView& view, Use use) {
    const auto walk = [&](const auto* units) {
      for (std::size_t i = 0; i < view.length; ++i) use(std::uint32_t{units[i]});
    };
    if (view.storage == Storage::kUcs2) {
      walk(static_cast<const std::uint16_t*>(view.data));
    } else if (view.storage == Storage::kUcs4) {
      walk(static_cast<const std::uint32_t*>(view.data));
    } else {
      walk(static_cast<const std::uint8_t*>(view.data));
    }
  }

  py::object owner_;
  std::vector<TextView> views_;
};

CleanMode clean_mode(const std::string& name) {
  if (name == "lower") return CleanMode::kLower;
  if (name == "whitespace") return CleanMode::kWhitespace;
  if (name == "canonicalize") return CleanMode::kCanonicalize;
  throw py::value_error("clean is 'lower', 'whitespace' or 'canonicalize', not '" + name + "'");
}

class Native {
 public:
  Native(std::shared_ptr<Vocabulary> vocabulary, const std::string& start_of_text,
         const std::string& end_of_text, const std::string& clean, bool strict, int unicode_version,
         unsigned threads, const std::string& scan)
      : encoder_(std::move(vocabulary), unicode_tables(unicode_version),
                 Dialect{start_of_text, end_of_text, clean_mode(clean), strict}, choose(scan),
                 threads),
        unicode_version_(unicode_tables(unicode_version).version) {}

  // Write the rows of all texts. `clean` is asked for the repaired form of a text that ftfy has to
  // look at, `encode` for the ids of one that these tables do not cover. Returns None, or the first
  // text that is in the way: (index, "utf-8" | "length", byte or tokens).
  py::object rows(const Texts& texts, std::uintptr_t data, std::size_t context_length, int id_bytes,
                  std::uintptr_t lengths, bool truncate, const py::function& clean,
                  const py::function& encode) {
    const Rows rows{reinterpret_cast<void*>(data), context_length, id_bytes,
                    reinterpret_cast<std::int32_t*>(lengths)};
    std::vector<Unwritten> unwritten;
    {
      const py::gil_scoped_release released;
      unwritten = encoder_.encode(texts.views(), texts.size(), truncate, rows);
    }
    for (const Unwritten& row : unwritten) {
      std::size_t tokens = row.detail;
      switch (row.reason) {
        case Unwritten::Reason::kNotUtf8:
          return py::make_tuple(row.index, "utf-8", row.detail);
        case Unwritten::Reason::kTooLong:
          return py::make_tuple(row.index, "length", tokens);
        case Unwritten::Reason::kMojibake: {
          const py::str cleaned = clean(texts.as_str(row.index));
          if (encoder_.encode_cleaned(view_of_str(cleaned.ptr()), row.index, truncate, rows,
                                      &tokens))
            break;
          return py::make_tuple(row.index, "length", tokens);
        }
        case Unwritten::Reason::kUnassigned: {
          const auto ids = encode(texts.as_str(row.index)).cast<std::vector<std::uint16_t>>();
          if (BatchEncoder::write_ids(ids.data(), ids.size(), row.index, truncate, rows, &tokens))
            break;
          return py::make_tuple(row.index, "length", tokens);
        }
      }
    }
    return py::none();
  }

  // The ids of one text, without its ends.
  py::object ids(const py::str& text, const py::function& clean, const py::function& encode) {
    std::vector<std::uint16_t> ids;
    Outcome outcome = Outcome::kEncoded;
    const auto use = [&](bool cleaned, const TextView& view) {
      const py::gil_scoped_release released;
      encoder_.with_encoder([&](Encoder& encoder) {
        outcome = cleaned ? encoder.encode_cleaned(view, SIZE_MAX) : encoder.encode(view, SIZE_MAX);
        ids.assign(encoder.ids(), encoder.ids() + encoder.count());
      });
    };
    use(false, view_of_str(text.ptr()));
    if (outcome == Outcome::kUnassigned) return encode(text);
    if (outcome == Outcome::kMojibake) {
      const py::str cleaned = clean(text);
      use(true, view_of_str(cleaned.ptr()));
    }
    return py::cast(ids);
  }

  const std::string& scan() const { return scan_; }
  const std::string& unicode_version() const { return unicode_version_; }

 private:
  AsciiScan choose(const std::string& wanted) {
    if (wanted == "portable") {
      scan_ = wanted;
      return scan_portable;
    }
    const char* name = nullptr;
    const AsciiScan scan = best_ascii_scan(&name);
    scan_ = name;
    return scan;
  }

  std::string scan_;
  BatchEncoder encoder_;
  const std::string unicode_version_;
};

// Rows of ids, without what pads them, one behind the other.
void pack(std::uintptr_t rows, std::uintptr_t lengths, std::size_t count,
          std::size_t context_length, std::uintptr_t packed) {
  const py::gil_scoped_release released;
  const auto* from = reinterpret_cast<const std::int32_t*>(rows);
  const auto* length = reinterpret_cast<const std::int32_t*>(lengths);
  auto* to = reinterpret_cast<std::int32_t*>(packed);
  for (std::size_t i = 0; i < count; ++i, from += context_length) {
    to = std::copy_n(from, length[i], to);
  }
}

}  // namespace
}  // namespace fastclip

PYBIND11_MODULE(_native, module) {
  using namespace fastclip;
  module.doc() = "CLIP's tokenizer in C++; use fastclip.tokenizer.Tokenizer.";
  py::dict made_with;
  made_with["regex"] = kMadeWithRegex;
  made_with["ftfy"] = kMadeWithFtfy;
  module.attr("MADE_WITH") = made_with;
  py::class_<Vocabulary, std::shared_ptr<Vocabulary>>(module, "Vocabulary")
      .def(py::init([](const py::bytes& merges) {
             return std::make_shared<Vocabulary>(std::string_view(merges));
           }),
           py::arg("merges"));
  py::class_<Texts>(module, "Texts")
      .def_static("from_sequence", &Texts::from_sequence)
      .def_static("from_offsets_32", &Texts::from_offsets<std::int32_t>)
      .def_static("from_offsets_64", &Texts::from_offsets<std::int64_t>)
      .def_static("from_cells", &Texts::from_cells)
      .def("select", &Texts::select)
      .def("utf8_size", &Texts::utf8_size)
      .def("write_utf8", &Texts::write_utf8, py::arg("data"), py::arg("offsets"))
      .def("__len__", &Texts::size)
      .def("as_str", &Texts::as_str);
  py::class_<Native>(module, "Native")
      .def(py::init<std::shared_ptr<Vocabulary>, const std::string&, const std::string&,
                    const std::string&, bool, int, unsigned, const std::string&>(),
           py::arg("vocabulary"), py::arg("start_of_text"), py::arg("end_of_text"), py::kw_only(),
           py::arg("clean"), py::arg("strict"), py::arg("unicode_version"), py::arg("threads"),
           py::arg("scan"))
      .def("rows", &Native::rows, py::arg("texts"), py::arg("data"), py::arg("context_length"),
           py::arg("id_bytes"), py::arg("lengths"), py::arg("truncate"), py::arg("clean"),
           py::arg("encode"))
      .def("ids", &Native::ids, py::arg("text"), py::arg("clean"), py::arg("encode"))
      .def_property_readonly("scan", &Native::scan)
      .def_property_readonly("unicode_version", &Native::unicode_version);
  module.def("pack", &pack, py::arg("rows"), py::arg("lengths"), py::arg("count"),
             py::arg("context_length"), py::arg("packed"));
}
