"""Environments: how they are named and made, one or many at a time, and flowrl's own."""

import gymnasium

if "flowrl/TMaze-v0" not in gymnasium.registry:  # else this module is being reloaded
    gymnasium.register("flowrl/TMaze-v0", entry_point="flowrl.envs.memory:TMaze")
    for name in ("HalfCheetah", "Walker2d", "Hopper"):
        gymnasium.register(
            f"flowrl/{name}Cued-v0",
            entry_point="flowrl.envs.cued_speed:CuedSpeed",
            max_episode_steps=400,
            kwargs={"robot": name.lower()},
        )
        gymnasium.register(
            f"flowrl/{name}Hidden-v0",
            entry_point="flowrl.envs.hidden_dynamics:HiddenDynamics",
            max_episode_steps=300,
            kwargs={"robot": name.lower()},
        )
