"""What public programs import out of Ray's inner modules, as far as it means anything here.

The names are those seen in programs and libraries; what they give is what minray has for it.  All else that is
inner to Ray is missing: a program that needs it works with Ray's processes, which are not there.
"""
