"""Training runs on Lightning; `mmmae.recipes.pretrain` imports it."""
