// The emulated device as the host sees it.
#pragma once

#include <cstdint>
#include <string>

namespace emulator {

// Adds the kernels of a PTX module; throws Error.
void load_module(std::string text);
// Forgets all modules.
void unload_modules();
// Runs a kernel of a module by its name; throws Error. sizes: of the grid, of a block, of a cluster, three each.
void launch_by_name(const std::string& name, const uint32_t* sizes, uint32_t shared, void** arguments);
// What the device says of itself: its compute capability times 10, how many multiprocessors.
void set_device(int capability, int multiprocessors);
// What went wrong in this thread since the last call, or nothing.
std::string take_error();

}  // namespace emulator
