// The kernels for baseline; the build gives this file its instruction set.
#define PK_ISA baseline
#define PK_NAME "baseline"
#include "cpu/kernels_impl.h"
