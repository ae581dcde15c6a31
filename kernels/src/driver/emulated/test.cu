// Kernels with a mistake each, which the emulator must find.
#include "element.cuh"
