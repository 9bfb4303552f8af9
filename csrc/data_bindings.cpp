// The module fastclip.data._native, put together from its parts' bindings.
#include "data_bindings.h"

#include <pybind11/pybind11.h>

PYBIND11_MODULE(_native, module) {
  module.doc() = "The data path's C++; use fastclip.data.";
  fastclip::bind_members(module);
  fastclip::bind_phrases(module);
  fastclip::bind_resample(module);
}
