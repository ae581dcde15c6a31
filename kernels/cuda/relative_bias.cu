// Relative position biases by clamped distance.
//
//     bias[H, 2R+1] = table[bucket(distance), H]ᵀ        d_table[b] += Σ d_bias[distance] over the distances in bucket b
//
// Legend: H heads (a block each), R the largest distance that is told apart; distances −R … R are key − query.
//
// Distances below half a side's buckets have one each, the others fall into logarithmically wider ones, as
// `RelativeBuckets::bucket` has it: also in f64, and with the same nudge, without which the logarithms of two libraries
// might disagree where a bucket begins at a whole number of steps.
#include "element.cuh"

constexpr double NUDGE = 1e-6;

struct Buckets {
    u32 count;
    i32 reach;
    bool bidirectional;

    DEVICE u32 of(i32 relative) const {
        const u32 side = bidirectional ? count / 2 : count;
        const u32 first = bidirectional && relative > 0 ? side : 0;
        const u32 distance = !bidirectional && relative > 0 ? 0 : abs(relative);
        const u32 exact = side / 2;
        if (distance < exact) return first + distance;
        const double steps = log(double(distance) / exact) / log(double(reach) / exact) * (side - exact);
        return first + min(exact + u32(steps + NUDGE), side - 1);
    }
};

KERNEL LAUNCH_BOUNDS(256) relative_bias_forward(
    const element* table, u32 table_stride, float* bias, u32 bias_stride, u32 num_buckets, u32 reach, u32 bidirectional
) {
    const Buckets buckets{num_buckets, i32(reach), bidirectional != 0};
    const u32 head = blockIdx.x;
    for (u32 distance = threadIdx.x; distance <= 2 * reach; distance += blockDim.x) {
        const u32 bucket = buckets.of(i32(distance) - i32(reach));
        bias[u64(head) * bias_stride + distance] = to_float(table[u64(bucket) * table_stride + head]);
    }
}

KERNEL LAUNCH_BOUNDS(256) relative_bias_backward(
    const float* d_bias, u32 d_bias_stride, float* d_table, u32 d_table_stride, u32 num_buckets, u32 reach,
    u32 bidirectional
) {
    Shared shared;
    const u32 distances = 2 * reach + 1;
    u32* bucket_of = shared.take<u32>(distances);
    float* gradients = shared.take<float>(distances);
    const Buckets buckets{num_buckets, i32(reach), bidirectional != 0};
    const u32 head = blockIdx.x;
    for (u32 distance = threadIdx.x; distance < distances; distance += blockDim.x) {
        bucket_of[distance] = buckets.of(i32(distance) - i32(reach));
        gradients[distance] = d_bias[u64(head) * d_bias_stride + distance];
    }
    __syncthreads();
    for (u32 bucket = threadIdx.x; bucket < num_buckets; bucket += blockDim.x) {
        float sum = d_table[u64(bucket) * d_table_stride + head];
        for (u32 distance = 0; distance < distances; distance++) {
            if (bucket_of[distance] == bucket) sum += gradients[distance];
        }
        d_table[u64(bucket) * d_table_stride + head] = sum;
    }
}
