"""Every option of every command, as dataclasses checked as they are made (see `base.py`).

This package imports neither torch nor lightning, so that `--help` answers at once. Options of one stage are one
class, and a command's options are the stages' classes joined. What only experts change is no flag: it is given to
`expert`, and from Python by its own name.
"""
