"""Training with PyTorch (extra ``train``); inference never imports this package.

``tsad.training.network`` is the torch twin of the network that the C core runs, ``data`` reads
demonstrations, ``train`` fits the network to them and writes a tsad folder (``tsad train-policy``);
``sensitivity`` measures what reuse does, ``pruner`` learns to foresee it (``tsad train-pruner``);
``targets`` is where many steps end, ``fit`` moves a setting's sampler there and ``weights`` the
policy's weights (``tsad fit``).

Importing this package alone needs no torch, so that the command line can list its commands without
it.
"""
