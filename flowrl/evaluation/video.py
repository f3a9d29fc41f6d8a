"""Film an agent: one episode per target return, one after the other, in one mp4 file."""

import os
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from PIL import Image, ImageDraw

from flowrl.atomic import atomic_path
from flowrl.envs.spaces import environment_actions
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


def write_video(
    path: Path, agent: BatchedAgent, environment: EnvironmentSpec, targets: Sequence[float], seed: int
) -> None:
    """Render the first episode of each target, as :func:`evaluate` starts it, into one mp4 file at ``path``.

    Frames go to the encoder as they are drawn, so memory does not grow with the episodes. Every frame
    shows the target, the return so far and the step. The file appears whole or not at all.

    Raises:
        UserError: see :func:`check_video`; also when the environment cannot be rendered here.
    """
    check_video(path)
    env = make_rendered_env(environment)
    steps_per_second = env.metadata.get("render_fps") or 30
    stride = -(-int(steps_per_second) // MAX_FRAMES_PER_SECOND)  # rounded up
    first = int(episode_seeds(seed, 1)[0])
    frames = chain.from_iterable(_frames(agent, env, target, first, stride) for target in targets)
    try:
        with atomic_path(path) as temporary:
            _encode(temporary, frames, steps_per_second / stride)
    except OSError as error:
        reason = str(error).split("\n\n")[-1].strip().splitlines()[-1]
        raise UserError(f"--video {path}: cannot be written: {reason}") from error
    finally:
        env.close()


def make_rendered_env(environment: EnvironmentSpec) -> gym.Env:
    """Make an environment that draws itself, also without a screen, its camera following the robot."""
    headless = sys.platform == "linux" and not os.environ.get("DISPLAY")
    if headless and os.environ.get("MUJOCO_GL", "") in ("", "glfw"):
        # Without a screen MuJoCo draws through EGL (GLFW would crash the process). Gymnasium reads this
        # when the first frame is drawn.
        os.environ["MUJOCO_GL"] = "egl"
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


def _frames(agent: BatchedAgent, env: gym.Env, target: float, seed: int, stride: int) -> Iterator[np.ndarray]:
    """Act for one episode and yield every ``stride``-th frame and the last, (height, width, 3) uint8."""
    observation, _ = env.reset(seed=seed)
    agent.reset(1, np.array([target]))
    rewards, return_so_far, step, finished = None, 0.0, 0, False
    yield _captioned(_render(env), target, return_so_far, step)
    while not finished:
        action = environment_actions(env.action_space, agent.act(observation[None], rewards))[0]
        observation, reward, terminated, truncated, _ = env.step(action)
        rewards = np.asarray(reward, dtype=np.float64).reshape(1)
        return_so_far += rewards.item()
        step += 1
        finished = terminated or truncated
        if finished or step % stride == 0:
            yield _captioned(_render(env), target, return_so_far, step)


def _render(env: gym.Env) -> np.ndarray:
    try:
        frame = env.render()
    except Exception as error:  # OpenGL backends raise whatever they like
        reason = " ".join(str(error).split())
        raise UserError(
            f"--video: the environment cannot be rendered here: {reason} (MUJOCO_GL=egl or osmesa may help)"
        ) from error
    return np.asarray(frame, dtype=np.uint8)


def _captioned(frame: np.ndarray, target: float, return_so_far: float, step: int) -> np.ndarray:
    image = Image.fromarray(frame)
    caption = f"target {target:g}   return {return_so_far:.0f}   step {step}"
    ImageDraw.Draw(image).text((8, 8), caption, fill="white", stroke_width=1, stroke_fill="black")
    return np.asarray(image)
