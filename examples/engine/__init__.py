"""The parts of ``examples/mini_engine.py``, each of which a serving engine has in some form."""
