"""A whole Hopper episode by scripts/examples/act_with_onnx.mjs, each action compared with the agent's own.

python .ci/act_in_javascript.py FOLDER  # where npm installed onnxruntime-web
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np

from flowrl import load_agent

folder = Path(sys.argv[1])
example = Path(shutil.copy("scripts/examples/act_with_onnx.mjs", folder))
step = folder / "step.onnx"
subprocess.run(
    [sys.executable, "-m", "flowrl", "export", "pretrained:hopper-medium", "--out", step], check=True
)
agent = load_agent("pretrained:hopper-medium")
target = agent.config.targets[0]
env = gym.make("Hopper-v5")
observation, _ = env.reset(seed=0)
agent.reset(1, target)
reward, earned, steps, difference, over = None, 0.0, 0, 0.0, False
with subprocess.Popen(
    ["node", example, step], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
) as process:
    assert process.stdin is not None
    assert process.stdout is not None
    while not over:
        # Conditioned on the target itself, as this agent was trained to be.
        line = {"observation": observation.tolist(), "return_to_go": target, "first": steps == 0}
        print(json.dumps(line), file=process.stdin, flush=True)
        action = np.array(json.loads(process.stdout.readline()), np.float32)
        expected = agent.act(observation[None], reward)[0]
        difference = max(difference, float(abs(action - expected).max()))
        observation, earned_now, terminated, truncated, _ = env.step(action)
        reward = np.array([earned_now])
        earned, steps, over = earned + float(earned_now), steps + 1, terminated or truncated
    process.stdin.close()
print(f"JavaScript: {steps} timesteps, return {earned:.1f}, actions differ by at most {difference:.1e}")
assert agent.conditioning == "target"
assert steps > 100
assert difference < 1e-4
