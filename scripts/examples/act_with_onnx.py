"""Act for one episode with an exported step and onnxruntime, without flowrl or torch.

flowrl export RUN --out step.onnx && python scripts/examples/act_with_onnx.py step.onnx
"""

import json
import sys

import gymnasium
import numpy as np
import onnxruntime

FORMAT_VERSION = 1


def act(path: str, seed: int = 0) -> float:
    """Act for one episode; return what it earned."""
    session = onnxruntime.InferenceSession(path)
    about = json.loads(session.get_modelmeta().custom_metadata_map.get("flowrl", "{}"))
    if about.get("format_version") != FORMAT_VERSION:
        sys.exit(f"{path}: not a step that flowrl exported in format {FORMAT_VERSION}; export it again")
    task = about["environment"]
    env = gymnasium.make(task["env_id"], max_episode_steps=task["max_episode_steps"], **task["kwargs"])

    # All zeros before the first timestep: the episode so far, in arrays of constant size.
    state = {
        "timesteps": np.zeros(1, np.int64),
        "previous_actions": np.zeros((1, about["action_dim"]), np.float32),
    }
    state |= {name: np.zeros((1, *shape), np.float32) for name, shape in about["state_shapes"].items()}

    # Some agents are conditioned on the target itself at every timestep, others on what is left of it.
    subtracts = about["conditioning"] == "return-to-go" and about["reward_mode"] == "dense"
    observation, _ = env.reset(seed=seed)
    target, earned, over = about["targets"][0], 0.0, False
    while not over:
        inputs = {
            "observations": observation[None].astype(np.float32),
            "returns_to_go": np.array([target - earned if subtracts else target], np.float32),
            **state,
        }
        actions, *after = session.run(about["outputs"], inputs)
        state = dict(zip(about["inputs"][2:], after, strict=True))
        action = actions[0]
        if about["action_choices"]:  # one-hot vectors side by side
            parts = np.split(action, np.cumsum(about["action_choices"])[:-1])
            action = np.squeeze([part.argmax() for part in parts])
        observation, reward, terminated, truncated, _ = env.step(action)
        earned += float(reward)
        over = terminated or truncated
    env.close()
    return earned


if __name__ == "__main__":
    print(f"return {act(sys.argv[1]):.1f}")
