// The arithmetic of every statistic, shared by CPU and CUDA: raw values, host and device, no torch.
#pragma once

#include "numerics/finish.h"
#include "numerics/gradient.h"
#include "numerics/online.h"
#include "numerics/scalar.h"
#include "numerics/stats.h"
