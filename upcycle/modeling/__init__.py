"""The BAM model; the two files beside this one travel inside each checkpoint."""


def register() -> None:
    """Make transformers' Auto classes load `bam` checkpoints with these classes, and save the code with the weights."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from upcycle.modeling.configuration_bam import BamConfig
    from upcycle.modeling.modeling_bam import BamForCausalLM, BamModel

    AutoConfig.register("bam", BamConfig, exist_ok=True)
    AutoModel.register(BamConfig, BamModel, exist_ok=True)
    AutoModelForCausalLM.register(BamConfig, BamForCausalLM, exist_ok=True)
    BamConfig.register_for_auto_class()
    BamModel.register_for_auto_class("AutoModel")
    BamForCausalLM.register_for_auto_class("AutoModelForCausalLM")
