#pragma once

#include <Python.h>

namespace objkern {

// default_call(triton: bool, logits, target, terms: list[float], masked: bool, options: tuple, defaults: tuple): the
// mean loss, or None where the call has to go the general way. `options` are the very objects of `defaults`, or they
// were given by the caller.
PyObject* default_call(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace objkern
