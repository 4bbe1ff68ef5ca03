// What the lists of names.h (pykernels/ops/names.json) become: PK_ACTIVATIONS(PK_NAME) is "none, relu, ...,".
// Torch-free.
#pragma once

#include <names.h>

#define PK_NAME(name, ...) name,
#define PK_QUOTED(name, ...) #name,
#define PK_COUNTED(name, ...) +1
