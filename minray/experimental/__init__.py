"""Ray's old homes of things: the state API (now `minray.state`) and progress bars in tasks (now `minray.util.tqdm`)."""
