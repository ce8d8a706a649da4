#include "build_facts.h"

namespace objkern {

BuildFacts build_facts() {
#ifdef OBJKERN_CUDA_ARCHS  // setup.py defines both
  return {OBJKERN_CUDA_ARCHS, OBJKERN_CUDA_COMPILER};
#else
  return {};
#endif
}

}  // namespace objkern
