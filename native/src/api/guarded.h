// Building blocks of every C ABI function: argument checks, and exceptions turned into a status and a message.
#pragma once

#include "edge_speq.h"
#include "hook/hook.h"
#include "util/error.h"

#include <exception>
#include <new>
#include <string>

namespace edge::api {

inline std::string & last_error() {
    thread_local std::string text;
    return text;
}

inline void require(bool ok, const char * what) {
    if (!ok) {
        throw edge::Error(EDGE_ERR_ARGUMENT, what);
    }
}

template <typename F> int guarded(F && body) noexcept {
    try {
        last_error().clear();
        body();
        return EDGE_OK;
    } catch (const edge::Error & e) {
        last_error() = e.what();
        return e.status;
    } catch (const std::bad_alloc &) {
        last_error() = "out of memory";
        return EDGE_ERR_MEMORY;
    } catch (const std::exception & e) {
        last_error() = e.what();
        return EDGE_ERR_INTERNAL;
    } catch (...) {
        last_error() = "an exception of unknown type";
        return EDGE_ERR_INTERNAL;
    }
}

inline edge::SlotCache & slot_cache_of(const edge_hook * hook) {
    require(hook != nullptr, "hook is null");
    require(hook->slot_cache() != nullptr, "the hook keeps routing only, it has no slots");
    return *hook->slot_cache();
}

} // namespace edge::api
