"""What the runs of these tests are made of: a tiny base, secrets that must not show, a recipe that takes a while."""

from job_process import COLOURS

TOKEN = "xoxb-1234-token-in-a-path"
SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwx",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCY",
    "MY_API_KEY": "correct horse battery staple",
}


def long_recipe(job):
    """Long enough to be stopped in the middle: evaluations at 0, 10, 20, 30, checkpoints each 4 steps, dropout on."""
    job.recipe["train"]["steps"] = 30
    job.recipe["checkpoint"] = {"every_steps": 4, "keep": 2}
    job.recipe["evaluate"]["every_steps"] = 10
    return job


def letters_as_tokens(folder):
    """A tokenizer of single bytes, of which classes with a pre-tokenizer of their own (Qwen's) make the same."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "<s>", "</s>", "\u0120", "\u010a", *(chr(number) for number in range(33, 127))]
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def make_base(folder, *, tied=False, positions=64, rows=128):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "\n", "hats", *COLOURS, *(str(n) for n in range(10, 99))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
