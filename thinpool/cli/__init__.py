"""The command line: translates words into calls of the API and answers into text; decides nothing.

Everything here is imported as late as it can be: ``--version`` and completion answer within 0.1 s,
so no module of this package imports rich, the API or the model before a command needs it.
"""
