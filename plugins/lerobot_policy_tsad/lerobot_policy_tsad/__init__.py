"""Imported by LeRobot's commands at their start: diffusion policies that ask for it run in tsad.

A policy asks by a file ``tsad.json`` in its checkpoint folder; ``TSAD=exact`` in the environment,
or ``TSAD="sampler=ddim,num_inference_steps=8"``, asks for all. Without either nothing changes.
"""

from tsad.lerobot.plugin import activate

activate()
