// What a value is stored as, for kernels of every device.
#pragma once

namespace peftrt {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

}  // namespace peftrt
