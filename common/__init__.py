"""Command lines, files and signals: what every program here needs, and nothing of the project.

command_line    programs that end with one line and a status instead of a traceback
arguments       the arguments of a program as a dataclass: flags, help and limits of each field
files           JSON that is checked, files that are written whole or not at all, locks
ranges          ranges of numbers, shuffled without a list and shared out over ranks
signals         asking a program to stop
dtypes          whether a CPU is faster in bfloat16
weights         the tensors in a directory of Hugging Face's layout
"""
