// Windows of consecutive transitions copied out of a dataset's arrays; compiled on first use, called by sampler.py.

#include <algorithm>
#include <cstdint>

namespace {

// ``length`` rows of which the first ``rows`` come from ``from``; the others repeat the last of these.
void copy_padded(const float* from, int64_t rows, int64_t length, int64_t width, float* to) {
    float* const end = std::copy(from, from + rows * width, to);
    for (float* row = end; row < to + length * width; row += width) std::copy(end - width, end, row);
}

// Ask for rows before they are needed, or for the first of many: where windows lie no processor can guess.
void fetch(const float* from, int64_t size) {
    constexpr int64_t MOST = 1024, LINE = 16;
    for (int64_t i = 0; i < std::min(size, MOST); i += LINE) __builtin_prefetch(from + i);
}

}  // namespace

// windows (batch, 3) are first transition, end, first timestep. Arrays of the dataset are (transitions, ...), those
// written to are (batch, length, ...); an action before the dataset's first is that one.
extern "C" void gather_windows(int64_t batch, int64_t length, int64_t observation_dim, int64_t action_dim,
                               const int32_t* windows, const float* observations, const float* actions,
                               const float* returns_to_go, float* to_observations, float* to_actions,
                               float* to_previous_actions, float* to_returns_to_go, int64_t* to_timesteps,
                               bool* to_valid) {
    for (int64_t b = 0; b < batch; b++, windows += 3) {
        const int64_t first = windows[0], rows = windows[1] - first, row = b * length;
        if (b + 1 < batch) {
            const int64_t next = windows[3], more = windows[4] - next;
            fetch(observations + next * observation_dim, more * observation_dim);
            fetch(actions + next * action_dim, more * action_dim);
            fetch(returns_to_go + next, more);
        }
        copy_padded(observations + first * observation_dim, rows, length, observation_dim,
                    to_observations + row * observation_dim);
        copy_padded(actions + first * action_dim, rows, length, action_dim, to_actions + row * action_dim);
        copy_padded(returns_to_go + first, rows, length, 1, to_returns_to_go + row);
        const int64_t missing = first == 0;
        float* previous = to_previous_actions + row * action_dim;
        if (missing) std::copy(actions, actions + action_dim, previous);
        if (missing < rows)
            copy_padded(actions + (first + missing - 1) * action_dim, rows - missing, length - missing, action_dim,
                        previous + missing * action_dim);
        else
            copy_padded(previous, 1, length, action_dim, previous);
        for (int64_t t = 0; t < length; t++) {
            to_timesteps[row + t] = windows[2] + std::min(t, rows - 1);
            to_valid[row + t] = t < rows;
        }
    }
}
