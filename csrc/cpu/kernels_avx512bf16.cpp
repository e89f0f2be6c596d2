// The kernels for avx512bf16; the build gives this file its instruction set.
#define PK_ISA avx512bf16
#define PK_NAME "avx512bf16"
#include "cpu/kernels_impl.h"
