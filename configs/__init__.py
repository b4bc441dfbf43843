"""One file a run; `base.py` and `autoencoder_base.py` say what every value means."""
