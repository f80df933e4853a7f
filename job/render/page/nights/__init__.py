"""A channel's nights: the chapter of one night on its run's page, and the page of them all."""
