"""The commands of `tsad`, one module each; see `tsad.cli`."""
