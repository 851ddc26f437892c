"""Two processes of torchrun on this machine, and a story that is small enough for them."""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
STORY = ["--threads=1", "--device=cpu", "--base.steps=30", "--base.rows=500", "--insert.steps=40",
         "--insert.rows=500", "--insert.lr=3e-3", "--sft.steps=6", "--sft.rows=200", "--sft.at=3",
         "--preference.steps=6", "--preference.rows=100", "--ppo.iterations=2", "--ppo.rollouts=16",
         "--ppo.minibatch=8", "--ppo.epochs=2", "--rl.at=1", "--red.rounds=2", "--red.proposals=11",
         "--red.tune.steps=20", "--red.tune.rows=200", "--red.imitate.steps=4",
         "--adversarial.steps=4", "--adversarial.rows=100", "--adversarial.at=0",
         "--relearn.most=1", "--relearn.n=5", "--recite=5", "--eval.n=15",
         "--eval.curve_n=5", "--eval.max_new=6"]
