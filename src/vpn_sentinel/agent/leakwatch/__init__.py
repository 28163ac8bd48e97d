"""The leak watch: sees each packet that leaves this namespace outside the tunnel, and sleeps while none does."""
