"""Evaluation of policies and settings: what `tsad eval`, `tsad tune` and `tsad bench` ask for.

``loading``   policies as arguments and settings ask for them
``timing``    how long chunks take here
``play``      episodes of one setting in a simulator, kept and gone on with
``sweep``     many settings over the same seeds
``errors``    errors of actions on recorded observations
``realtime``  the latency of a run whose simulator does not wait
``jobs``      who plays: this process, several, a cluster
``usage``     errors in the words of the command line
``progress``  bars and lines of a log

It parses and prints nothing but progress; `tsad.commands` does.
"""
