// Numbers in the text that custom ops carry, read the same way under any locale.
#pragma once

#include <charconv>
#include <string_view>
#include <system_error>

#include <torch/headeronly/util/Exception.h>

namespace prefkern {

// The whole of `text` as a number of type T; an error that names `what` for anything else.
template <class T>
T parse_number(std::string_view what, std::string_view text) {
  T number{};
  const char* const end = text.data() + text.size();
  const auto [stopped, error] = std::from_chars(text.data(), end, number);
  STD_TORCH_CHECK(error == std::errc() && stopped == end, what,
                  " must be a number that fits, got '", text, "'.");
  return number;
}

}  // namespace prefkern
