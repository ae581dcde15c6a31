use serde_json::{Value, json};

use super::*;

fn cluster() -> Cluster {
    Cluster {
        name: "g2p".to_owned(),
        namespace: Some("science".to_owned()),
        image: "registry.example/quintet:0.1".to_owned(),
        nodes: 4,
        gpus_per_node: 8,
        claim: "data".to_owned(),
        job: "output_dir = \"runs/g2p\"\n\n[data]\ninput = \"say: {word}\"\n".to_owned(),
        coordinator_arguments: words(&["--set", "training.seed=1"]),
        worker_arguments: words(&["--device", "cuda"]),
        authority: BTreeMap::from([("authority.key".to_owned(), b"key".to_vec())]),
        tokens: words(&["quintet1.a", "quintet1.b"]),
    }
}

/// As the API's server would get it.
fn json<T: Serialize>(object: &T) -> Value {
    serde_json::to_value(object).unwrap()
}

#[test]
fn workers_are_an_indexed_job_with_gpus() {
    let job = json(&cluster().workers());
    assert_eq!((&job["apiVersion"], &job["kind"]), (&json!("batch/v1"), &json!("Job")));
    assert_eq!((&job["metadata"]["name"], &job["metadata"]["namespace"]), (&json!("g2p-workers"), &json!("science")));
    let spec = &job["spec"];
    assert_eq!(
        (&spec["completionMode"], &spec["completions"], &spec["parallelism"]),
        (&json!("Indexed"), &json!(4), &json!(4))
    );
    let pod = &spec["template"]["spec"];
    assert_eq!(pod["terminationGracePeriodSeconds"], 120);
    assert_eq!((&pod["restartPolicy"], &pod["subdomain"]), (&json!("Never"), &json!("g2p")));
    let container = &pod["containers"][0];
    assert_eq!(container["resources"]["limits"], json!({"nvidia.com/gpu": "8"}));
    let expected = "worker --coordinator https://g2p-coordinator-0.g2p:4700 --listen $(POD_IP):4710 \
                    --wait-seconds 3600 --nproc-per-node 8 --device cuda";
    let said: Vec<&str> = container["args"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
    assert_eq!(said.join(" "), expected);
    assert_eq!(container["ports"].as_array().unwrap().len(), 8);
    for probe in ["startupProbe", "livenessProbe"] {
        assert_eq!(container[probe]["tcpSocket"]["port"], 4710);
    }
    let without = json(&Cluster { gpus_per_node: 0, ..cluster() }.workers());
    assert_eq!(without["spec"]["template"]["spec"]["containers"][0]["resources"], Value::Null);
}

#[test]
fn the_coordinator_has_a_name_that_stays_and_asks_for_no_gpu() {
    let job = json(&cluster().coordinator());
    assert_eq!(job["metadata"]["name"], "g2p-coordinator");
    assert_eq!((&job["spec"]["completionMode"], &job["spec"]["completions"]), (&json!("Indexed"), &json!(1)));
    let container = &job["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(container["resources"], Value::Null);
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
        assert_eq!(container[probe]["tcpSocket"]["port"], 4700);
    }
    let said: Vec<&str> = container["args"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
    let expected = "coordinator /etc/quintet/job/job.toml --listen $(POD_IP):4700 --authority /etc/quintet/authority \
                    --resume --workers 32 --set training.seed=1";
    assert_eq!(said.join(" "), expected);
    // $(POD_IP) is put in by Kubernetes.
    assert_eq!(container["env"][0]["valueFrom"]["fieldRef"]["fieldPath"], "status.podIP");
}

#[test]
fn the_service_has_no_address_and_finds_both_jobs_pods() {
    let service = json(&cluster().service());
    assert_eq!(service["spec"]["clusterIP"], "None");
    assert_eq!(service["spec"]["publishNotReadyAddresses"], true);
    let selector = service["spec"]["selector"].as_object().unwrap();
    for job in [cluster().coordinator(), cluster().workers()] {
        let labels = &json(&job)["spec"]["template"]["metadata"]["labels"];
        assert!(selector.iter().all(|(key, value)| labels[key] == *value), "{labels}");
    }
}

#[test]
fn exit_codes_mean_what_they_say() {
    let policy = json(&failure_policy());
    let expected = json!({"rules": [
        {"action": "FailJob", "onExitCodes": {"containerName": "quintet", "operator": "In", "values": [2, 70]}},
        {"action": "Ignore", "onExitCodes": {"containerName": "quintet", "operator": "In", "values": [75]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]});
    assert_eq!(policy, expected);
    for job in [cluster().coordinator(), cluster().workers()] {
        assert_eq!(json(&job)["spec"]["podFailurePolicy"], expected);
    }
}

#[test]
fn secrets_go_to_those_who_need_them() {
    let mounted = |job: &Job| -> Vec<String> {
        let volumes = json(job)["spec"]["template"]["spec"]["volumes"].clone();
        let secrets = volumes.as_array().unwrap().iter().filter_map(|volume| volume["secret"]["secretName"].as_str());
        secrets.map(str::to_owned).collect()
    };
    assert_eq!(mounted(&cluster().coordinator()), ["g2p-authority"]);
    assert_eq!(mounted(&cluster().workers()), ["g2p-tokens"]);
    // No token is where a description of a pod shows it.
    for job in [cluster().coordinator(), cluster().workers()] {
        assert!(!json(&job).to_string().contains("quintet1"));
    }
    for job in [cluster().coordinator(), cluster().workers()] {
        let pod = &json(&job)["spec"]["template"]["spec"];
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["automountServiceAccountToken"], false);
        let container = &pod["containers"][0]["securityContext"];
        assert_eq!(container["capabilities"]["drop"], json!(["ALL"]));
        assert_eq!(container["readOnlyRootFilesystem"], true);
    }
}

#[test]
fn what_a_container_mounts_is_a_volume_of_its_pod() {
    for job in [cluster().coordinator(), cluster().workers()] {
        let pod = &json(&job)["spec"]["template"]["spec"];
        let names = |list: &Value| -> Vec<String> {
            let mut names: Vec<String> =
                list.as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap().to_owned()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&pod["volumes"]), names(&pod["containers"][0]["volumeMounts"]));
        assert!(pod["volumes"].to_string().contains(r#""persistentVolumeClaim":{"claimName":"data"}"#));
    }
}

#[test]
fn the_manifest_is_six_documents_to_read() {
    let text = cluster().manifest().unwrap();
    let kinds: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("kind: ")).collect();
    assert_eq!(kinds, ["Secret", "Secret", "ConfigMap", "Service", "Job", "Job"]);
    assert_eq!(text.lines().filter(|line| *line == "---").count(), 6);
    // The job file is a block to read, line by line.
    assert!(text.contains("\n  job.toml: |\n    output_dir = \"runs/g2p\"\n\n    [data]\n"), "{text}");
}

#[test]
fn names_are_checked() {
    cluster().validate().unwrap();
    let long = "x".repeat(41);
    for name in ["", "Big", "a_b", "-a", "a-", "1a", &long] {
        let error = Cluster { name: name.to_owned(), ..cluster() }.validate().unwrap_err();
        assert!(error.is_user_error() && error.to_string().starts_with("--name: "), "{error}");
    }
    assert!(Cluster { image: "an image".to_owned(), ..cluster() }.validate().is_err());
}
