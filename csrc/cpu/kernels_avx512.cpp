// The kernels for avx512; the build gives this file its instruction set.
#define PK_ISA avx512
#define PK_NAME "avx512"
#include "cpu/kernels_impl.h"
