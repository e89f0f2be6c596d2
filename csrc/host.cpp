// prefkern._C: what this build and this CPU can do, and planners that run on the host on numpy
// arrays. No torch here: the op libraries are separate and know nothing of Python.
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu_info.h"
#include "planner.h"

namespace py = pybind11;

namespace {

using Int64Array = py::array_t<int64_t, py::array::c_style>;

std::string shape_text(const py::array& a) {
  std::string text = "[";
  for (py::ssize_t i = 0; i < a.ndim(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(a.shape(i));
  }
  return text + "]";
}

// A 1-d integer array as int64. Floats, bools and other shapes are refused: a silent cast of
// lengths would hide a caller's mistake.
Int64Array integers(const py::object& given, const std::string& name, const char* advice) {
  const py::array a = py::array::ensure(given);
  if (!a) {
    PyErr_Clear();
    throw py::value_error(name + " must be a 1-d integer array, got " +
                          py::str(py::type::of(given)).cast<std::string>() + "; " + advice);
  }
  const bool empty_list = a.size() == 0 && !py::isinstance<py::array>(given);  // [] is float64
  if (a.ndim() != 1 || (a.dtype().kind() != 'i' && a.dtype().kind() != 'u' && !empty_list)) {
    throw py::value_error(name + " must be a 1-d integer array, got " +
                          py::str(a.dtype()).cast<std::string>() + " " + shape_text(a) + "; " +
                          advice);
  }
  if (a.dtype().kind() == 'u' && a.itemsize() == 8) {
    for (const auto x : py::array_t<uint64_t, py::array::c_style | py::array::forcecast>(a)) {
      if (x.cast<uint64_t>() > uint64_t(std::numeric_limits<int64_t>::max())) {
        throw py::value_error(name + " must fit in int64, got " + py::str(x).cast<std::string>() +
                              "; " + advice);
      }
    }
  }
  return py::array_t<int64_t, py::array::c_style | py::array::forcecast>(a);
}

std::span<const int64_t> view(const Int64Array& a) {
  return {a.data(), size_t(a.size())};
}

// Tokens of each group [G]: sums of `lengths` [S] over the boundaries `cu_groups` [G+1].
std::vector<int64_t> group_costs(std::span<const int64_t> lengths,
                                 std::optional<std::span<const int64_t>> cu_groups) {
  for (size_t s = 0; s < lengths.size(); ++s) {
    if (lengths[s] < 0 || lengths[s] > std::numeric_limits<int32_t>::max()) {
      throw py::value_error("lengths must be between 0 and 2**31 - 1 (cu_seqlens is int32), got " +
                            std::to_string(lengths[s]) + " for sequence " + std::to_string(s) +
                            "; pass the token count of each sequence.");
    }
  }
  if (!cu_groups) return {lengths.begin(), lengths.end()};
  const auto cu = *cu_groups;
  const int64_t total = int64_t(lengths.size());
  if (cu.empty() || cu.front() != 0 || cu.back() != total) {
    const std::string got = cu.empty()
                                ? "an empty array"
                                : std::to_string(cu.front()) + " ... " + std::to_string(cu.back());
    throw py::value_error("cu_groups must start at 0 and end at the number of sequences " +
                          std::to_string(total) + ", got " + got +
                          "; build it as the cumulative sum of the group sizes with a leading 0.");
  }
  std::vector<int64_t> costs;
  costs.reserve(cu.size() - 1);
  for (size_t g = 0; g + 1 < cu.size(); ++g) {
    if (cu[g] > cu[g + 1]) {
      throw py::value_error("cu_groups must never decrease, got " + std::to_string(cu[g]) +
                            " then " + std::to_string(cu[g + 1]) + " at position " +
                            std::to_string(g) + "; sort the boundaries.");
    }
    int64_t cost = 0;
    for (int64_t s = cu[g]; s < cu[g + 1]; ++s) cost += lengths[size_t(s)];
    costs.push_back(cost);
  }
  return costs;
}

Int64Array to_numpy(const std::vector<int64_t>& values) {
  return Int64Array(py::ssize_t(values.size()), values.data());
}

std::pair<Int64Array, Int64Array> plan_batches(const py::object& lengths, int64_t budget,
                                               const py::object& cu_groups,
                                               const std::string& method,
                                               std::optional<int64_t> max_groups) {
  if (method != "first_fit_decreasing" && method != "in_order") {
    throw py::value_error("method must be 'first_fit_decreasing' or 'in_order', got '" + method +
                          "'.");
  }
  if (budget < 1) {
    throw py::value_error("budget must be at least 1 token per batch, got " +
                          std::to_string(budget) + ".");
  }
  if (max_groups && *max_groups < 1) {
    throw py::value_error("max_groups must be at least 1 or None, got " +
                          std::to_string(*max_groups) + "; use None for no limit.");
  }
  const Int64Array seqs = integers(lengths, "lengths", "pass the token count of each sequence.");
  std::optional<Int64Array> bounds;
  if (!cu_groups.is_none()) {
    bounds = integers(cu_groups, "cu_groups", "pass the boundaries of the groups, or None.");
  }
  const auto costs = group_costs(view(seqs), bounds ? std::optional(view(*bounds))
                                                    : std::optional<std::span<const int64_t>>());
  for (size_t g = 0; g < costs.size(); ++g) {
    if (costs[g] > budget) {
      throw py::value_error("every group must fit into the budget of " + std::to_string(budget) +
                            " tokens, and group " + std::to_string(g) + " has " +
                            std::to_string(costs[g]) +
                            "; raise the budget, shorten its sequences (max_length) or drop it.");
    }
  }
  const int64_t limit = max_groups.value_or(std::numeric_limits<int64_t>::max());
  prefkern::BatchPlan plan;
  {
    py::gil_scoped_release release;
    plan = method == "in_order" ? prefkern::plan_in_order(costs, budget, limit)
                                : prefkern::plan_first_fit_decreasing(costs, budget, limit);
  }
  return {to_numpy(plan.groups), to_numpy(plan.cu_batches)};
}

std::vector<std::string> split_commas(const std::string& text) {
  std::vector<std::string> parts;
  size_t begin = 0;
  while (begin <= text.size()) {
    const size_t end = std::min(text.find(',', begin), text.size());
    if (end > begin) parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = PREFKERN_CXX;
  info["compiler_version"] = __VERSION__;
  info["flags"] = PREFKERN_CXX_FLAGS;
  info["isa_variants"] = split_commas(PREFKERN_ISA_VARIANTS);
  info["isa_flags"] = PREFKERN_ISA_FLAGS;
  info["torch"] = PREFKERN_BUILD_TORCH;
  info["torch_target"] = PREFKERN_TORCH_TARGET;
  return info;
}

py::dict cpu_capabilities() {
  const prefkern::CpuInfo cpu = prefkern::detect_cpu();
  py::dict info;
  info["architecture"] = cpu.architecture;
  info["vendor"] = cpu.vendor;
  info["model"] = cpu.model;
  info["isa"] = cpu.isa;
  info["variants"] = prefkern::runnable_variants(cpu);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host side of prefkern: build and CPU information, planners on numpy arrays.";
  m.def("build_info", &build_info,
        "How the native part was built: compiler, flags, instruction-set variants, torch.");
  m.def("cpu_capabilities", &cpu_capabilities,
        "This CPU: architecture, vendor, model, isa, and the kernel variants it can run.");
  m.def("plan_batches", &plan_batches, py::arg("lengths"), py::arg("budget"),
        py::arg("cu_groups") = py::none(), py::kw_only(),
        py::arg("method") = "first_fit_decreasing", py::arg("max_groups") = py::none(),
        R"(Pack groups of sequences into batches of at most `budget` tokens.

Args:
    lengths: Tokens of each sequence, int [S].
    budget: Most tokens in a batch.
    cu_groups: Boundaries of the groups on the sequence axis, int [G+1]; a group is never split.
        None: every sequence is a group.
    method: 'first_fit_decreasing' (fewest batches: largest group first, ties by index, into the
        first batch with room) or 'in_order' (greedy, keeps the order).
    max_groups: Most groups in a batch, or None.

Returns:
    (groups int64 [G], cu_batches int64 [B+1]): batch b is groups[cu_batches[b]:cu_batches[b+1]],
    ascending.

Raises:
    ValueError: Bad lengths or boundaries, or a group larger than the budget.)");
}
