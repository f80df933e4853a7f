"""An attempt's hold on its run: which run it is, the lock, the records, the watch over it."""
