// The kernels for avx2; the build gives this file its instruction set.
#define PK_ISA avx2
#define PK_NAME "avx2"
#include "cpu/kernels_impl.h"
