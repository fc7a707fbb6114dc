"""What the verbs' help texts share: the one table of exit codes. No verb itself; imports nothing."""

EXIT_CODES = """\b
Exit codes:
  0   yes
  1   ran and failed
  2   wrong usage, config, model, data or checkpoint
  3   does not fit in memory or on disk
  4   doctor found something
  75  interrupted; the same command resumes
  130 stopped with Ctrl-C
"""
