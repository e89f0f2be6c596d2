// Arguments of list_rank's CUDA kernels and the function that launches them: raw pointers and
// numbers, no torch and no CUDA types, so that the emulation on a CPU has the very same interface.
#pragma once

#include "cuda/sweep.h"
#include "list_options.h"

namespace prefkern {

struct ListArgs {
  const int32_t* cu = nullptr;       // [G+1]
  const int64_t* topk = nullptr;     // [G] or null
  const void* scores = nullptr;      // [S] double or float, as are labels, loss and slope
  const void* labels = nullptr;      // [S], NaN where masked
  void* loss = nullptr;              // [G]
  void* slope = nullptr;             // [S]; 0 outside [cu[0], cu[G])
  unsigned char* scratch = nullptr;  // list_scratch(args) bytes
  int64_t groups = 0, items = 0;     // G >= 1, S
  bool doubles = false;
  ListFamily family = ListFamily::pair;
  ListOptions options;
};

// Bytes of device memory in which groups of more than 32 items work: about 50 per item of the
// batch, since the host does not know the sizes of groups; 0 where no group can be that large.
int64_t list_scratch(const ListArgs& args);

// Throws std::runtime_error with the kernel's name, the launch and the shapes on a CUDA error.
void list_rank(const ListArgs& args, const Stream& stream);

}  // namespace prefkern
