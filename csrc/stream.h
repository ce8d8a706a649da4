// The device's current stream, as torch would have it.
//
// Asked through torch's registry of device guards, which a CUDA build of torch fills when it is loaded: so this needs
// neither a CUDA header nor a CUDA library of torch, and a binding built against a CPU torch finds the streams of a
// CUDA torch of the same version. (torch has had getStreamNativeHandle since 2.11, the oldest that objkern takes.)
#pragma once

#include <c10/core/Device.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace objkern {

// cudaStream_t for a CUDA device. Throws torch's own error if this torch knows no such devices.
inline void* current_stream(const c10::Device& device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return guard.getStreamNativeHandle(guard.getStream(device));
}

}  // namespace objkern
