#pragma once

#include <stdexcept>
#include <string>

namespace edge {

// An error with the status that the C ABI returns for it.
struct Error : std::runtime_error {
    int status;
    Error(int status_, const std::string & what) : std::runtime_error(what), status(status_) {}
};

} // namespace edge
