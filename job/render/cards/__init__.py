"""Model cards: of an adapter, and of a merged model, with the front matter that both have."""
