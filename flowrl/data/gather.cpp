// Windows of consecutive transitions copied out of a dataset's arrays; compiled on first use, called by sampler.py.

#include <algorithm>
#include <cstdint>

struct Sizes {  // mirrors sampler.py
    int64_t batch, length, observation_dim, action_dim;
};

namespace {

// ``length`` rows of which the first ``rows`` come from ``from``; the others repeat the last of these.
void copy_padded(const float* from, int64_t rows, int64_t length, int64_t width, float* to) {
    float* const end = std::copy(from, from + rows * width, to);
    for (float* row = end; row < to + length * width; row += width) std::copy(end - width, end, row);
}

}  // namespace

// windows (batch, 3) are first transition, end, first timestep. Arrays of the dataset are (transitions, ...), those
// written to are (batch, length, ...); an action before the dataset's first is that one.
extern "C" void gather_windows(const Sizes* sizes, const int32_t* windows, const float* observations,
                               const float* actions, const float* returns_to_go, float* to_observations,
                               float* to_actions, float* to_previous_actions, float* to_returns_to_go,
                               int64_t* to_timesteps, bool* to_valid) {
    const Sizes at = *sizes;
    const int64_t width = at.action_dim;
    for (int64_t b = 0; b < at.batch; b++, windows += 3) {
        const int64_t first = windows[0], rows = windows[1] - first, row = b * at.length;
        copy_padded(observations + first * at.observation_dim, rows, at.length, at.observation_dim,
                    to_observations + row * at.observation_dim);
        copy_padded(actions + first * width, rows, at.length, width, to_actions + row * width);
        copy_padded(returns_to_go + first, rows, at.length, 1, to_returns_to_go + row);
        const int64_t missing = first == 0;
        float* previous = to_previous_actions + row * width;
        if (missing) std::copy(actions, actions + width, previous);
        if (missing < rows)
            copy_padded(actions + (first + missing - 1) * width, rows - missing, at.length - missing, width,
                        previous + missing * width);
        else
            copy_padded(previous, 1, at.length, width, previous);
        for (int64_t t = 0; t < at.length; t++) {
            to_timesteps[row + t] = windows[2] + std::min(t, rows - 1);
            to_valid[row + t] = t < rows;
        }
    }
}
