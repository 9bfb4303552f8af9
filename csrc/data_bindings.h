// What the parts of the data path offer to Python.
#pragma once

#include <pybind11/pybind11.h>

namespace fastclip {

void bind_members(pybind11::module_& module);
void bind_phrases(pybind11::module_& module);
void bind_resample(pybind11::module_& module);

}  // namespace fastclip
