"""The commands: their options and their steps.

A command is a module with ``main(argv: Sequence[str] | None = None) -> None``; a file of the same name in
``tools/`` calls it. Importing this package imports no command.
"""
