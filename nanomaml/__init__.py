"""The plumbing that a fork leaves alone; what a researcher reads and edits lies in the folder above.

Each module does one job, which its first line says. They import each other and, where their first lines say
so, `model`; never a command.
"""
