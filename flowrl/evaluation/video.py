"""Film an agent: one episode per target return, side by side, in one mp4 file."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flowrl.atomic import atomic_path
from flowrl.envs.failures import named_failure
from flowrl.envs.specs import EnvironmentSpec
from flowrl.envs.vector import make_env
from flowrl.errors import UserError
from flowrl.evaluation.evaluate import episode_seeds
from flowrl.evaluation.rollout import BatchedAgent

MAX_FRAMES_PER_SECOND = 64  # Hopper has 125 steps per second of physics: every second one is drawn


def check_video(path: Path) -> None:
    """Check, before hours of evaluation, that a video can be written to ``path``.

    Raises:
        UserError: not an .mp4 name, or moviepy is not installed.
    """
    if path.suffix.lower() != ".mp4":
        raise UserError(f"--video {path}: the name must end in .mp4")
    try:
        import moviepy.video.io.ffmpeg_writer  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--video {path}: install the 'video' extra first: pip install 'flowrl[video]'"
        ) from error


def check_rendering(environment: EnvironmentSpec) -> None:
    """Draw one frame, likewise before hours of evaluation.

    Raises:
        UserError: the environment cannot be rendered here.
        EnvironmentFailure: it raised an exception.
    """
    with closing(make_rendered_env(environment)) as env:
        with named_failure(environment, "reset"):
            env.reset(seed=0)
        _render(env)


def write_video(
    path: Path, agent: BatchedAgent, environment: EnvironmentSpec, targets: Sequence[float], seed: int
) -> None:
    """Render the first episode of each target, as :func:`evaluate` starts it, into one mp4 file at ``path``.

    Frames go to the encoder as they are drawn, so memory does not grow with the episodes. Every episode
    has its picture in the frame, with its target, the return so far and the step. The file appears whole
    or not at all.

    Raises:
        UserError: see :func:`check_video`; also when the environment cannot be rendered here.
        EnvironmentFailure: it raised an exception.
    """
    check_video(path)
    first = int(episode_seeds(seed, 1)[0])
    try:
        with ExitStack() as stack, atomic_path(path) as temporary:
            envs = [stack.enter_context(closing(make_rendered_env(environment))) for _ in targets]
            steps_per_second = envs[0].metadata.get("render_fps") or 30
            stride = -(-int(steps_per_second) // MAX_FRAMES_PER_SECOND)  # rounded up
            _encode(
                temporary,
                _frames(agent, environment, envs, targets, first, stride),
                steps_per_second / stride,
            )
    except OSError as error:
        reason = str(error).split("\n\n")[-1].strip().splitlines()[-1]
        raise UserError(f"--video {path}: cannot be written: {reason}") from error


def make_rendered_env(environment: EnvironmentSpec) -> gym.Env:
    """Make an environment that draws itself, also without a screen, its camera following the robot."""
    headless = sys.platform == "linux" and not os.environ.get("DISPLAY")
    if headless and os.environ.get("MUJOCO_GL", "") in ("", "glfw"):
        # Without a screen MuJoCo draws through EGL (GLFW would crash the process). Gymnasium reads this
        # when the first frame is drawn.
        os.environ["MUJOCO_GL"] = "egl"
    with suppress(ImportError):
        # Mesa's LLVM and Triton's cannot be loaded in this order; torch may import Triton at any later time.
        import triton  # noqa: F401
    env = make_env(environment, render_mode="rgb_array")
    renderer: Any = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is not None and renderer.camera_id == -1:
        # Gymnasium 1.4 draws from a camera that stays where the robot started; its models have one that
        # follows (where not, the id stays -1).
        renderer.camera_id = mujoco.mj_name2id(renderer.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    return env


def _encode(path: Path, frames: Iterator[np.ndarray], frames_per_second: float) -> None:
    """Write frames, (height, width, 3) uint8 each, to an mp4 file; stop the encoder whatever happens."""
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

    first = next(frames)
    size = (first.shape[1], first.shape[0])
    # The format is named because a temporary file's name does not end in .mp4.
    with FFMPEG_VideoWriter(str(path), size, frames_per_second, ffmpeg_params=["-f", "mp4"]) as writer:
        encoder = writer.proc
        for frame in chain([first], frames):
            writer.write_frame(frame)
    if encoder.returncode != 0:
        raise OSError(f"the encoder stopped with exit code {encoder.returncode}")


def _frames(
    agent: BatchedAgent,
    environment: EnvironmentSpec,
    envs: Sequence[gym.Env],
    targets: Sequence[float],
    seed: int,
    stride: int,
) -> Iterator[np.ndarray]:
    """Act for one episode per target; yield every ``stride``-th frame of all of them, and each one's last.

    Frames are (height, width, 3) uint8; an episode that is over stays at its last picture.
    """
    with named_failure(environment, "reset"):
        observations = [env.reset(seed=seed)[0] for env in envs]
    agent.reset(len(envs), np.asarray(targets))
    pictures = [_captioned(_render(env), target, 0.0, 0) for env, target in zip(envs, targets, strict=True)]
    yield _side_by_side(pictures)
    running, returns = list(range(len(envs))), np.zeros(len(envs))
    rewards: np.ndarray | None = None  # (running,)
    for step in count(1):
        actions = agent.act(np.stack([observations[slot] for slot in running]), rewards)
        earned, still = [], []
        for slot, action in zip(running, actions, strict=True):
            with named_failure(environment, "a step"):
                observations[slot], reward, terminated, truncated, _ = envs[slot].step(action)
            earned.append(np.asarray(reward, dtype=np.float64).item())
            returns[slot] += earned[-1]
            still.append(not (terminated or truncated))
            if step % stride == 0 or not still[-1]:
                pictures[slot] = _captioned(_render(envs[slot]), targets[slot], returns[slot], step)
        if step % stride == 0 or not all(still):
            yield _side_by_side(pictures)
        if not any(still):
            return
        kept = np.flatnonzero(still)
        agent.keep(kept)
        running, rewards = [running[row] for row in kept], np.array(earned)[kept]


def _side_by_side(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Lay pictures of one size out in rows of at most four, the rest of the last row black."""
    columns = min(len(pictures), 4)
    filled = [*pictures, *[np.zeros_like(pictures[0])] * (-len(pictures) % columns)]
    rows = [np.hstack(filled[start : start + columns]) for start in range(0, len(filled), columns)]
    return np.vstack(rows)


def _render(env: gym.Env) -> np.ndarray:
    try:
        frame = env.render()
    except Exception as error:  # OpenGL backends raise whatever they like
        reason = " ".join(str(error).split())
        raise UserError(
            f"--video: the environment cannot be rendered here: {reason} (MUJOCO_GL=egl or osmesa may help)"
        ) from error
    if not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.shape[2] != 3:
        raise UserError("--video: the environment draws no pictures (render_mode rgb_array)")
    return frame.astype(np.uint8)


def _captioned(frame: np.ndarray, target: float, return_so_far: float, step: int) -> np.ndarray:
    """Write target, return so far and timestep on it; readable at half the frame's size."""
    image = Image.fromarray(frame)
    size = max(frame.shape[0] // 16, 10)  # pixels
    caption = f"target {target:g}\nreturn {return_so_far:.0f}   step {step}"
    font = ImageFont.load_default(size)
    ImageDraw.Draw(image).text(
        (size // 2, size // 4), caption, font=font, fill="white", stroke_width=2, stroke_fill="black"
    )
    return np.asarray(image)
