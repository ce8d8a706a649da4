// What this build was made with. In a file of its own, so that another list of architectures compiles nothing else
// anew but the CUDA kernels.
#pragma once

namespace objkern {

struct BuildFacts {
  const char* cuda_archs = nullptr;     // "8.0;9.0;10.0+PTX"; null: built without CUDA kernels
  const char* cuda_compiler = nullptr;  // "nvcc 13.0.88"
};

BuildFacts build_facts();

}  // namespace objkern
